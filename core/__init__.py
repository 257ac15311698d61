"""What every part uses: config, mesh and sharding, devices, optimizers, checkpoints, metrics, run folders."""
