"""Text in and out: tokenizer, chat template, reasoning and tool calls."""
