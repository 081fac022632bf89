"""Models with an encoder beside their decoder: a source is read once, and the decoder's steps attend over it."""
