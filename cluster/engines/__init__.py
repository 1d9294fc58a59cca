"""Engine adapters: a topology's words in, an engine's command line and environment out."""
