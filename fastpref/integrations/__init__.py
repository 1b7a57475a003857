"""The op inside other libraries' trainers; each integration imports its library on first use."""
