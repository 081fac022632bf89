#!lua flags=allow-oom
-- Ends a job if it runs, and erases all that is stored of it.
-- ARGV  1 id  2 tenant
-- Reply 1, or nil if there is no such job for this tenant.
--@include base
--@include jobs
if not is_of(ARGV[1], ARGV[2]) then return false end
local j = load(ARGV[1])
if is_live(j) then cancel(j, 'CANCELLED', now_ms()) end
erase(j.id)
call('ZREM', P .. 'failed', j.id)
return 1
