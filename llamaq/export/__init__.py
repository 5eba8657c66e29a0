"""The .pte: ExecuTorch's exporter, the gates the file must pass, running it, and measuring its speed."""
