"""From the trained model to the file on the phone: Meta's checkpoint layout, the .pte, and running it."""
