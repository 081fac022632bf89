"""Tasks of encoder models: texts batched by length through one forward pass, and what their answers are made of."""
