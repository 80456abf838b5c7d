"""The `chat` format: conversations, rendered by the tokenizer's chat template, with loss on the assistant's turns."""
