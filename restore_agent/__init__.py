"""The restore agent of one node: its snapshots, their ladder, and the replicas made from them."""
