"""The `indexed` format: Megatron's `.bin` and `.idx` files, in the order of Megatron's GPTDataset."""
