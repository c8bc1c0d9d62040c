"""What the simulated fleet installs: a CPU torch without torch.distributed, and source trees with CPU kernels.

`python -m simulator.artefacts --out DIR` prepares them and prints where they are, as JSON.
"""
