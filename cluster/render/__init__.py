"""Files that start this system on clusters: settings, quoting, and rendering from `cluster/templates`."""
