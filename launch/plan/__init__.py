"""What a run costs on a mesh, before anyone rents the devices: `python -m launch.plan --help`."""
