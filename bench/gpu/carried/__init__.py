"""What travels to a machine whose time is short: a Triton cache that is filled without a GPU, and what it all weighs.

- `launches` runs the launching code itself on a simulated device (`record`) and notes every kernel variant it asks for;
- `keys` computes what Triton calls the entries of its cache, for the build that the wheel of the target holds;
- `fill` compiles the variants on the CPU's cores into a folder; `install` puts them where a device's Triton looks;
- `sizes` adds up tree, wheels and cache.
"""
