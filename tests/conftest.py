"""What must hold before any test module is imported."""

from __future__ import annotations

import os
import shutil

from hypothesis import settings

# Ray reads this when it is imported: it keeps a cluster on 127.0.0.1.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# A test never talks to a cluster that happens to run on the machine.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ADDRESS"] = "local"
# Triton, too, reads when it is imported whether its kernels are interpreted, on the CPU.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.support.cluster_fixture"]

# A busy machine with two cores is no reason for a property to fail.
settings.register_profile("tokenflow", deadline=None)
settings.load_profile("tokenflow")
