"""What the method stands on: models, prompts, sampling, readouts, texts, run folders."""
