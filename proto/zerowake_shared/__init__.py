"""What more than one room needs. It knows none of them: a contract of import-linter's says so.

What comes from outside a process is decoded by one of three, in every room:

    pydantic    files: what people write, and manifests of snapshots. They are checked whole, and each mistake is named by its field.
    msgspec     JSON of others, as the API of Kubernetes has it: only the fields that a reader declares; all else is passed over, quickly.
    protobuf    between processes, ours and KEDA's, the kubelet's, the container runtime's: whatever is defined below proto/.
"""
