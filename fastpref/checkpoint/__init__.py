"""Files of a run: training checkpoints and Hugging Face model directories."""
