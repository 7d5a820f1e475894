"""What pods carry for the restore agent: labels and annotations, by the names that scaler/resources.py gives them too."""

SNAPSHOT, CAPTURE = "thaw.dev/snapshot", "thaw.dev/capture"  # labels: name of the ModelSnapshot
# Annotations, written by the webhook and the controller.
CONTAINER, PORT, HEALTH, MODEL, DIGEST = (f"thaw.dev/{word}" for word in ("container", "port", "health", "model", "digest"))
CANARY, GPUMEM = "thaw.dev/canary", "thaw.dev/gpumem"
CAPTURED, CAPTURE_FAILED = "thaw.dev/captured", "thaw.dev/capture-failed"  # by this agent
