"""The back ends that ship with fofa-deploy, one file each; a module is imported only when its back end is named."""

import sys

# Unless told otherwise OpenVINO and its converter report each use to their maker; without this module they do not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
