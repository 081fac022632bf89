"""The decode engine: scheduler, blocks, runner, attention, sampler. What uses torch and transformers is here."""
