"""The client's torch side: embedding, final norm, head, sampling, text.

Rows of hidden states go in and out as bytes, so that the session code below stays free of
torch. Start reading at `head.py`.
"""
