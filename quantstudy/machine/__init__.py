"""What this machine is: its processors and what they compute natively; the device and threads of a process."""
