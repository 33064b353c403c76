"""Adapters of HF PEFT, in and out: files alone, so that neither direction needs the library."""
