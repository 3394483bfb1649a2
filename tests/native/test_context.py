"""The low level with numpy arrays: tokens in, logits out, and the sequences in between."""
