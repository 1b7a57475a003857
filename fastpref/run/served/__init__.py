"""What the files of an export tell a server: the template of prompts, the tokens that end an answer, the tokenizer."""
