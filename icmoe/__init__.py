"""icmoe-fl: hospitals train IC-MoE, a mixture of experts on a frozen SAM backbone, without sharing images."""

import os

__version__ = "0.1.0"

# Flower and Ray report usage and look for updates unless told otherwise, and read this when they are imported.
# Nothing but the federation's own messages may leave a hospital.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would warn that a future version leaves CUDA_VISIBLE_DEVICES alone; that is what we want now.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
