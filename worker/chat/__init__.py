"""Takes the text of a model's answer apart: reasoning, plain text, tool calls."""
