"""What pods carry for the restore agent: labels and annotations, by the names that scaler/kubernetes/resources.py gives them too."""

SNAPSHOT, CAPTURE = "zerowake.dev/snapshot", "zerowake.dev/capture"  # labels: name of the ModelSnapshot
# Annotations, written by the webhook and the controller.
CONTAINER, PORT, HEALTH, MODEL, DIGEST = (f"zerowake.dev/{word}" for word in ("container", "port", "health", "model", "digest"))
CANARY, GPUMEM = "zerowake.dev/canary", "zerowake.dev/gpumem"
CAPTURED, CAPTURE_FAILED = "zerowake.dev/captured", "zerowake.dev/capture-failed"  # by this agent
