"""icmoe-fl: hospitals train IC-MoE, a mixture of experts on a frozen SAM backbone, without sharing images."""

__version__ = "0.1.0"
