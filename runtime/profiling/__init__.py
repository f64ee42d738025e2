"""Where the time, the memory and the energy go: measured stage by stage, written as a report, compared with another."""
