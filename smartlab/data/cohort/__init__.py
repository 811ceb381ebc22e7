"""What the data are: manifests, folders scanned, tables read, files verified."""
