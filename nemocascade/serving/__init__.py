"""Use of a model: a chat in the terminal, answers to a file of prompts, an OpenAI-compatible
server."""
