"""The networks: a 3D Swin encoder, semantic attention on top of it, and the heads."""
