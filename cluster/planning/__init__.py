"""What a run will take, computed before it is paid for: memory, time, data, money; and a simulation of it."""
