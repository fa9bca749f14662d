"""Messages, framing and tensor bytes. Sans-I/O: bytes in, values out, no torch.

Start with `messages.py`; docs/protocol.md is the specification.
"""
