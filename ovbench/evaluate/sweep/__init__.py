"""Many runs: methods x datasets x options as jobs, each a process of its own, on this machine or over a cluster."""
