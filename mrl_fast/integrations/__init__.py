"""Other libraries' interfaces: losses and layers over ours, vector stores over an index. Each
module needs its library; ``mrl_fast`` imports none of them."""
