"""The decode engine: scheduler, blocks, runner, attention, sampler. The only package that uses torch and transformers."""
