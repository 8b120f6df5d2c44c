"""What every long job needs: folders, files, the machine, progress."""
