"""Hopper: kernels in Gluon with TMA and warpgroup MMA."""
