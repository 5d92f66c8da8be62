"""Where training pictures come from: a folder, tar shards, a cache of tokens, the procedural ``shapes``."""
