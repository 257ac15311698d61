"""What starts things on machines: the plan of a run, launching on several hosts, surviving their loss."""
