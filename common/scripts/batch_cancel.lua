#!lua flags=allow-oom
-- Ends a batch that runs: its feeder hears of it when it renews its lease. One that has ended stays as it is.
-- ARGV  none
-- Reply: the batch as it is now, or nil if there is none
--@include batches
local state = call('HGET', B, 'st')
if not state then return false end
if state == 'R' then call('HSET', B, 'st', 'X') end
return describe()
