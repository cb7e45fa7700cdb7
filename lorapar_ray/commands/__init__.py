"""The commands of `lorapar`. Their docstrings are its help; their heavy imports wait until they run."""
