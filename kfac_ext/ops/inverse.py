from kfac_ext.reference.inverse import damped_inverse, damped_inverse_ex
