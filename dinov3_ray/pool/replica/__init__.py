"""A replica: one teacher on one device, its queue and its device pipeline."""
