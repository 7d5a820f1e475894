"""An engine in its place: started, asked, told of snapshots."""
