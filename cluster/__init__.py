"""Run llamaq on Ray: submit a job (`submit`), drive it (`job`), run a recipe on its workers (`worker`)."""
