#!lua flags=allow-oom
-- Ends a live job with the tokens that it has; a final one stays as it is.
-- ARGV  1 id  2 tenant  3 '1': any tenant (an operator)
-- Reply: the job as stored afterwards (see describe), or nil if there is none for this tenant.
--@include base
--@include jobs
if ARGV[3] ~= '1' and not is_of(ARGV[1], ARGV[2]) then return false end
local j = load(ARGV[1])
if not j then return false end
if is_live(j) then cancel(j, 'CANCELLED', now_ms()) end
return describe(load(ARGV[1]))
