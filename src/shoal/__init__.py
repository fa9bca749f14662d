"""Run and fine-tune large language models together on machines that are each too small."""

__version__ = "0.1.0"
