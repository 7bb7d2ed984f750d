"""Differential privacy: what is asked for, how it is accounted, and the training step that makes it true.

The only package that speaks Opacus.
"""
