"""The strategies of a Trainer: free ranks, meetings, the center in the module, and resuming."""
